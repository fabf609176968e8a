"""The JSON schema of recipes, by which editors complete and check them."""

import json

from .schema import Recipe


def recipe_schema() -> str:
    """As JSON text; `recipe.schema.json` in this folder holds it for the tested versions of TRL."""
    whole = Recipe.model_json_schema()
    definitions = {**whole.pop("$defs"), "Recipe": whole}
    extending = {
        "description": "A recipe that takes another one over: its keys are checked once they are put together.",
        "type": "object",
        "properties": {"extends": {"type": "string", "description": "The file of a recipe, or a shipped one's name."}},
        "required": ["extends"],
    }
    schema = {"$defs": definitions, "anyOf": [{"$ref": "#/$defs/Recipe"}, extending]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=1) + "\n"
