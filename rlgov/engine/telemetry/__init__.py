"""What an engine tells about itself, as samples: the plugin's state or a metrics page."""
