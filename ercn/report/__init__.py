"""Pages, tables, pictures and model cards of runs.

evaluation.py  ``EvaluationResult``, the content of evaluation/<name>.json
runs.py        a run's folder as the page reads it; colours of the runs
page.py        ``report``: the HTML page (page.html.jinja, style.css, gallery.js)
results.py     its tables, charts and pictures for each evaluation
charts.py      its charts as SVG
table.py       metrics as rows of text, titles of the metrics, the terminal's tables
gallery.py     pictures with maps and masks, as files
overlay.py     heat maps over pictures, outlines; their colours
model_card.py  the model card (model_card.md.jinja)
"""
