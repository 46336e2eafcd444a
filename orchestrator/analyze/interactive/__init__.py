"""The interactive figures of a report (plotly), and their encoding together with plotly.js in the page."""
