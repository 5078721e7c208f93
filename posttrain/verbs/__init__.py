"""Verbs of the command line that don't run a recipe's trainer; each module registers its own."""
