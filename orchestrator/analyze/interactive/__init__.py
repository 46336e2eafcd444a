"""Interactive figures of a report (plotly), and the JavaScript that shows them without a network."""
