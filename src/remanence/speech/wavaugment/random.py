"""All effects with random parameters, each example its own; `augmentation` tells how they draw."""

from remanence.speech.wavaugment.random_bands import RandomBandReject, RandomFrequencyDrop
from remanence.speech.wavaugment.random_levels import (
    RandomClip,
    RandomDither,
    RandomGain,
    RandomPolarity,
)
from remanence.speech.wavaugment.random_noise import RandomBabble, RandomNoise
from remanence.speech.wavaugment.random_pitch import RandomPitch, RandomSpeed, RandomTempo
from remanence.speech.wavaugment.random_room import RandomReverb, RandomRoom
from remanence.speech.wavaugment.random_spans import (
    RandomChunkSwap,
    RandomSpliceOut,
    RandomTimeDrop,
)

__all__ = [
    "RandomBabble",
    "RandomBandReject",
    "RandomChunkSwap",
    "RandomClip",
    "RandomDither",
    "RandomFrequencyDrop",
    "RandomGain",
    "RandomNoise",
    "RandomPitch",
    "RandomPolarity",
    "RandomReverb",
    "RandomRoom",
    "RandomSpeed",
    "RandomSpliceOut",
    "RandomTempo",
    "RandomTimeDrop",
]
