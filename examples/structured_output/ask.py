"""Ask for objects of one JSON schema with OpenAI's client."""

from __future__ import annotations

import json
import os

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["is_ad", "score"],
    "properties": {"is_ad": {"type": "boolean"}, "score": {"type": "integer", "minimum": 0, "maximum": 5}},
}

COMMENTS = ["Visit my channel for free gifts and a promo code", "The last chapter made me cry."]


def main() -> None:
    with OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="none") as client:
        for comment in COMMENTS:
            answer = client.chat.completions.create(
                model="demo",
                messages=[
                    {"role": "system", "content": "Is the comment an advertisement? Answer with JSON."},
                    {"role": "user", "content": f"Comment: {comment}"},
                ],
                response_format={"type": "json_schema", "json_schema": {"name": "judgement", "schema": SCHEMA}},
            )
            print(json.loads(answer.choices[0].message.content or ""), comment)


if __name__ == "__main__":
    main()
