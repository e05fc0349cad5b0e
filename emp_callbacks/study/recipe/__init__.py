"""Recipes and what they name: tasks, data, networks."""
