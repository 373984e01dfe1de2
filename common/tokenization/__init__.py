"""Records as tokens: prompts of language models, and lengths of texts."""
