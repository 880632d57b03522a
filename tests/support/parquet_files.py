"""Parquet files as geopandas, and stores as SpatialData, write them."""

import json

import pyarrow
import pyarrow.parquet
import shapely

AXES = [{"name": "x", "type": "space"}, {"name": "y", "type": "space"}]
YX = AXES[::-1]


def write_geoparquet(file, geometries, encoding="WKB", **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    geo = {"version": "1.0.0", "primary_column": "outline", "columns": {"outline": {"encoding": encoding}}}
    table = pyarrow.table({"outline": pyarrow.array(list(shapely.to_wkb(geometries)), pyarrow.binary()), **columns})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), file)
    return file


def transformation(axes=AXES, system="global", **values):
    return {"input": {"name": "own", "axes": axes}, "output": {"name": system, "axes": axes}, **values}


def write_shapes(store, name, geometries, *transformations, zarr_format=3, **columns):
    element = store / "shapes" / name
    write_geoparquet(element / "shapes.parquet", geometries, **columns)
    attributes = {"axes": ["x", "y"], "encoding-type": "ngff:shapes", "coordinateTransformations": transformations}
    for folder, values in ((store, {}), (store / "shapes", {}), (element, attributes)):
        if zarr_format == 3:
            group = {"zarr_format": 3, "node_type": "group", "attributes": values}
            (folder / "zarr.json").write_text(json.dumps(group))
        else:
            (folder / ".zgroup").write_text('{"zarr_format": 2}')
            (folder / ".zattrs").write_text(json.dumps(values))
    return store
