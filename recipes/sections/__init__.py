"""The sections a recipe is made of; import them from `recipes.schema`."""
