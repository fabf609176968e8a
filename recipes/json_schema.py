"""The JSON schema of recipes, by which editors complete and check them."""

import json

from .schema import Recipe


def recipe_schema() -> str:
    """As JSON text; `recipe.schema.json` in this folder holds it for the tested versions of TRL."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=1) + "\n"
