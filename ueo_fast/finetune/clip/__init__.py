"""The model: CLIP's towers, learned prompts, base weights, and what adaptation changes of them."""
