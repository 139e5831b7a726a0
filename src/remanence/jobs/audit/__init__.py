"""Jobs of the room audit."""
