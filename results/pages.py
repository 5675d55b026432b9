"""Pages of which a part is made by a program: tables, each known by its first line."""


def write_tables(page, tables):
    """Put tables in the place of those in a page that have the same first line."""
    for table in tables:
        header = table.splitlines()[0]
        before, found, after = page.read_text().partition(header)
        assert found, f"{page.name} has no table with the header {header}"
        _, end, rest = after.partition("\n\n")
        page.write_text(before + table + end[1:] + rest)
