"""The figures of a job, computed from its stored rows.

The way from a stored row to ``latency_s.p95`` of a report: 20 functions in 6 files.

=====================  ============================================================================================
file                   functions, in the order in which they are called
=====================  ============================================================================================
``summary``            ``summarise``, ``_summarised``
``inputs``             ``consistent``, ``read_facts``
``aggregate``          ``fold``, ``_fold_all``, ``_fold``
``columns``            ``Places.of``, ``Places.keys``
``row_sources``        ``NativeRows.blocks``, ``block_query``, ``_from_sqlite``
``columns``            ``parted``, ``Series.where``
``aggregate``          ``_Held.shape``, ``_Shape.add_times``
``percentiles``        ``Times.add``, ``Times.distribution``, ``Times.percentiles``
``metrics``            ``Metric.of``, which ``summary`` calls for every figure of the registry
=====================  ============================================================================================

Rows of other sources come by the same two methods (``row_sources.RowSource``): ``NativeRows`` reads by the driver of
one connection, ``ArrowRows`` large jobs by ADBC. Both give the blocks of numbers that ``columns.parted`` takes apart.
A new figure is an entry of ``metrics``: its name, label, unit, definition, and the formula over ``measured.Measured``.
"""
