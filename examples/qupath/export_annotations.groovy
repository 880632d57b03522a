// Annotations of a QuPath project, for `muvit train`.
//
// In the script editor: Run, Run for project. Every image with classified annotations gets
// <project>/muvit/labels/<image>.geojson; docs/tutorials/own-slides.md tells how to train from them.

import qupath.lib.common.GeneralTools

def slide = GeneralTools.toPath(getCurrentServer().getURIs().iterator().next())
def name = slide.getFileName().toString().replaceFirst(/(?i)(\.ome)?\.[^.]+$/, '')

def classified = getAnnotationObjects().findAll { it.getPathClass() != null }
if (classified.isEmpty()) {
    println "${name}: no annotation with a class"
    return
}
def folder = buildFilePath(PROJECT_BASE_DIR, 'muvit', 'labels')
mkdirs(folder)
def file = buildFilePath(folder, name + '.geojson')
exportObjectsToGeoJson(classified, file, 'FEATURE_COLLECTION')
println "${file}: ${classified.size()} annotations of ${slide}"
