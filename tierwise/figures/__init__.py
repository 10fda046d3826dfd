"""Every figure of tierwise, drawn from results as they stand in its JSON, in the one style of :mod:`tierwise.style`.

One module for each verb: :mod:`.plan`, :mod:`.simulation`, :mod:`.draft`, :mod:`.sweep`, :mod:`.validation`; each has a
``pictures`` that returns what it draws. A figure whose data is missing is a picture that says so and shows nothing.
"""
