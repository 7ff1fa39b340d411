"""The report of a run: report.html, its plots, and the result block.

Imports metrics, config and runtime, and from checkpoints only the names in a run directory.

numbers          numbers as text, and the facts of a stage that are read from its records
tables           the tables that the page shows
drawing          what all figures share: style, panels, curves and legends
router_figures   figures of routers: losses, entropy and the load of experts
figures          all figures of a run, written as plots/*.png
page             report.html: one page that needs no other file
templates/       the Jinja2 templates and the style sheet of that page
console          the result block that a run prints when it has finished
__main__         the command line: draws the report of a finished or running run again
"""
