"""The model: CLIP's towers, learnt prompts, base weights, and what adaptation changes of them."""
