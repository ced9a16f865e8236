"""What the user sees: console, figures, gallery and HTML page."""
