"""What jobs share: images, models, training, the run folder, the report."""
