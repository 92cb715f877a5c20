"""What the HTML pages are made of: templates, drawings, pictures and the run card. No torch."""
