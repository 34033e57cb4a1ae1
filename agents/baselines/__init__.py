"""Control rules to compare learned policies with."""
