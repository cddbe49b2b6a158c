"""How an edit runs: the plain way, the packed pass that does all edits at once, and tokens really removed."""
