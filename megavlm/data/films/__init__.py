"""Films: what becomes of one (``plan``), and how its frames are read (``header``, ``decoder``, ``container``)."""
