// Polygons of `muvit export` as objects of the open image, or of all images of a project (Run, Run for project).
//
// They are read from <project>/muvit/export/<image>.geojson, and replace objects of the same ids: an unchanged object
// has the same id in every export. Each becomes a child of the annotation that it lies in.

import qupath.lib.common.GeneralTools
import qupath.lib.io.PathIO

def slide = GeneralTools.toPath(getCurrentServer().getURIs().iterator().next())
def name = slide.getFileName().toString().replaceFirst(/(?i)(\.ome)?\.[^.]+$/, '')

def file = new File(buildFilePath(PROJECT_BASE_DIR, 'muvit', 'export', name + '.geojson'))
if (!file.exists()) {
    println "${file}: not there"
    return
}
def objects = PathIO.readObjects(file)
def ids = objects.collect { it.getID() } as Set
removeObjects(getAllObjects(false).findAll { it.getID() in ids }, true)
addObjects(objects)
resolveHierarchy()
println "${file}: ${objects.size()} objects"
