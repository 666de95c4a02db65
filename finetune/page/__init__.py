"""A page for people: runs, or a sweep, as one HTML file with its figures inside. No torch in here."""
