"""The shipped recipes, installed as `stepdistill_recipes`: YAML files that `stepdistill ls recipes` lists."""
