"""The embedded world: drawings with captions, a judge that reads them, teachers that were trained on them."""
