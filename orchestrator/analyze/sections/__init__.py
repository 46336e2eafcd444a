"""The sections of a report, each with its pictures, its tables and the values for its template."""
