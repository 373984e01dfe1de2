"""What a comparison shows: a checklist with its numbers, and the headline that follows from it."""
