"""Room of raw text: how documents become sentences of words."""
