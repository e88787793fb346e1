"""How good pictures are: distances from a reference, fit with prompts, variety, nearness to the teacher. Nothing here enters
training."""
