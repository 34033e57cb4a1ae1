"""Request traces: read, summarise, synthesise and fetch them."""
