"""The attention core of IPA: pure functions over arrays, free of Haiku and of frame classes."""
