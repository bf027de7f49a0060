"""File formats, one module each; `reading.FORMATS` says which reads what."""
