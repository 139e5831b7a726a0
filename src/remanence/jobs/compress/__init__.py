"""Jobs of the room compress."""
