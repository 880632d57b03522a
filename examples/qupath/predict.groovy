// Label the open image with a model of muvit, and show the result as objects.
//
// The selected annotations bound what is labelled; without a selection it is the whole image. Labels go to
// <project>/muvit/predictions, polygons to <project>/muvit/export. A run that was stopped goes on when the script is run
// again with the same selection.

import qupath.lib.common.GeneralTools

// ---- set these ----
def muvit = '/path/to/.venv/bin/muvit' // on Windows: 'C:\\path\\to\\.venv\\Scripts\\muvit.exe'
def model = '/path/to/runs/mine/best'
def predictOptions = ['--tissue', 'auto', '--probabilities', 'uint8']
def exportOptions = ['--object_type', 'detection', '--smooth_um', '1', '--min_area_um2', '10']
// -------------------

def slide = GeneralTools.toPath(getCurrentServer().getURIs().iterator().next()).toString()
def name = new File(slide).name.replaceFirst(/(?i)(\.ome)?\.[^.]+$/, '')
def base = buildFilePath(PROJECT_BASE_DIR, 'muvit')
mkdirs(base)

def call = { List<String> command ->
    println command.join(' ')
    def process = new ProcessBuilder(command).redirectErrorStream(true).start()
    process.inputStream.eachLine { println it }
    if (process.waitFor() != 0)
        throw new RuntimeException("muvit ${command[1]} failed; its message is above")
}

def selected = getSelectedObjects().findAll { it.isAnnotation() }
def predictions = buildFilePath(base, 'predictions')
if (!selected.isEmpty()) {
    def region = buildFilePath(base, 'region.geojson')
    exportObjectsToGeoJson(selected, region, 'FEATURE_COLLECTION')
    predictOptions += ['--region', region]
    // one folder for each selection, since a run of other tiles cannot go on
    predictions = buildFilePath(predictions, Integer.toHexString(new File(region).text.hashCode()))
}
def labels = buildFilePath(predictions, name + '.ome.zarr')
def exported = buildFilePath(base, 'export')

call([muvit, 'predict', model, slide, '--output', predictions] + predictOptions)
call([muvit, 'export', labels, '--image', slide, '--output', exported, '--geojson', '--overwrite'] + exportOptions)

importObjectsFromFile(buildFilePath(exported, name + '.geojson'))
resolveHierarchy()
