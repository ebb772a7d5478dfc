"""The figures of a job, computed from its stored rows.

The way of a value from a stored row to ``latency_s.p95`` of a report is 20 functions in 8 files. Read from the bottom
up, it is the order in which they call each other.

===============  ======================================================================================================
file             functions
===============  ======================================================================================================
``row_sources``  ``_from_sqlite`` (or ``_from_postgresql``), ``NativeRows.blocks``
``columns``      ``parted``, ``Series.timed``, ``Series.where``, ``Series.joined``, ``Series.part``
``percentiles``  ``Times.add``, ``Times.percentiles``, ``Times.distribution``
``aggregate``    ``_Held.shape``, ``_Shape.add_times``, ``_Shape.folded``, ``_fold``, ``fold``
``inputs``       ``read_facts``
``measured``     ``Measured``
``metrics``      ``Metric.of``: the formula of ``latency_s``
``summary``      ``_summary``, ``summarise_with_plots`` (``summarise`` calls it)
===============  ======================================================================================================

Not counted is what makes the query (``block_query``, ``Places``). Large jobs are read by ADBC: ``ArrowRows`` instead of
``NativeRows``, by the same two methods (``row_sources.RowSource``).

A new figure is an entry of ``metrics``: its name, label, unit, definition, and its formula over ``measured.Measured``.
"""
