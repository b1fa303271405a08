"""Pictures of saved results: each function reads JSON, so a report can be drawn again, and raises InputError for a path
that cannot be written."""
