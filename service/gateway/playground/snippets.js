// Code that makes the shown pictures again: curl, Python and gRPC.

const PICTURE = { png: "png", webp: "webp", jpeg: "jpg" };
const FILES = { image: "source.png", mask: "mask.png" };

// The fields of a request that the code repeats; defaults such as the output format are left out.
function chosen(request) {
  const { model, prompt, class_label: label, n, seed, sampler, steps, guidance, width, height, strength } = request;
  const negative = request.negative_prompt;
  return {
    model, ...(prompt == null ? { class_label: label } : { prompt }), ...(negative ? { negative_prompt: negative } : {}),
    n, seed, sampler, steps, guidance,
    ...(width == null ? {} : { width, height }), ...(strength == null ? {} : { strength }),
  };
}

// The files of a request by field, under the names that the page offers them for download.
function files(request) {
  return ["image", "mask"].filter((field) => request[field]).map((field) => [field, FILES[field]]);
}

const shell = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;

export function curl(request, { http, key }) {
  const auth = key ? ` \\\n  -H "Authorization: Bearer $PATCHFORGE_API_KEY"` : "";
  const file = PICTURE[request.output_format ?? "png"];
  const pictures = request.n > 1 ? `$(seq 0 ${request.n - 1})` : "0";
  return `${body(request)}job=$(curl -sSf ${http}/v1/jobs${auth} \\
  -H 'Content-Type: application/json' \\
  -d ${files(request).length > 0 ? "@request.json" : shell(JSON.stringify(chosen(request)))} \\
  | sed -E 's/^\\{"id":"([^"]+)".*/\\1/')
curl -sSfN ${http}/v1/jobs/$job/events${auth} > events.txt  # follows the job to its end
for index in ${pictures}; do
  curl -sSf "${http}/v1/jobs/$job/image?index=$index"${auth} -o picture-$index.${file}
done
`;
}

// Builds a request with files as a file: a command line could not hold it.
function body(request) {
  const parts = files(request);
  if (parts.length === 0) return "";
  const fields = parts.map(([field]) => `,"${field}":"%s"`).join("");
  const contents = parts.map(([, file]) => ` "$(text ${file})"`).join("");
  return `text() { base64 < "$1" | tr -d '\\n'; }
printf '%s${fields}}' \\
  ${shell(JSON.stringify(chosen(request)).slice(0, -1))} \\
 ${contents} > request.json
`;
}

const opened = (file) => `open(${literal(file)}, "rb").read()`;

export function python(request, { http, key }) {
  const auth = key ? `, api_key=os.environ["PATCHFORGE_API_KEY"]` : "";
  const fields = [
    ...Object.entries(chosen(request)).map(([name, value]) => `        ${name}=${literal(value)},\n`),
    ...files(request).map(([name, file]) => `        ${name}=${opened(file)},\n`),
  ];
  return `${key ? "import os\n\n" : ""}from patchforge import Client

with Client(${literal(http)}${auth}) as client:
    made = client.generate(
${fields.join("")}    )
for index, picture in enumerate(made.pictures):
    picture.save(f"picture-{index}.${PICTURE[request.output_format ?? "png"]}")
print(f"saved {made.report.savings_ratio:.0%} of a dense run's work")
`;
}

export function grpc(request, { grpc: target, key, secure }) {
  const { sampler: { name, ...knobs }, ...fields } = chosen(request);
  const lines = [
    ...Object.entries(fields).map(([field, value]) => `    ${field}=${literal(value)},\n`),
    ...files(request).map(([field, file]) => `    ${field}=${opened(file)},\n`),
  ];
  const options = Object.entries(knobs).map(([knob, value]) => `${knob}=${literal(value)}`).join(", ");
  const channel = secure
    ? `grpc.secure_channel(${literal(target)}, grpc.ssl_channel_credentials())`
    : `grpc.insecure_channel(${literal(target)})`;
  const metadata = key ? `, metadata=[("authorization", f"Bearer {os.environ['PATCHFORGE_API_KEY']}")]` : "";
  return `${key ? "import os\n\n" : ""}import grpc
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub

generation = pb.Generation(
${lines.join("")}    ${name}=pb.${message(name)}(${options}),
)
pictures = {}
with ${channel} as channel:
    request = pb.GenerateImageRequest(generation=generation)
    for answer in ImageServiceStub(channel).GenerateImage(request${metadata}):
        if answer.event.WhichOneof("event") == "image":  # large pictures come in several
            image = answer.event.image
            pictures[image.index] = pictures.get(image.index, b"") + image.data
for index, data in pictures.items():
    with open(f"picture-{index}.${PICTURE[request.output_format ?? "png"]}", "wb") as file:
        file.write(data)
`;
}

const message = (name) => `${name.split("_").map((word) => word[0].toUpperCase() + word.slice(1)).join("")}Sampler`;

// A value as Python writes it. JSON's escapes are Python's too.
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, each]) => `${literal(name)}: ${literal(each)}`).join(", ")}}`;
}
