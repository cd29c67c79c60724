"""HTML pages: reports and previews."""
