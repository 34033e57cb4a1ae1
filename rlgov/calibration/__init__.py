"""From measurements to profiles: tables of measured points, fits, and how well they hold."""
