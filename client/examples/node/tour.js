// Sample, encode, decode, and two calls that fail: the tour of a vaeserve server from Node.js.
//
//   npm ci
//   node tour.js [TARGET] [PICTURE]        default 127.0.0.1:50051; PICTURE (.pgm or .ppm) gets the samples

import fs from 'node:fs';

import { Client, explain, fromTensor, toTensor } from './vaeserve.js';

const COUNT = 8;
const SEED = '7';

const [target = '127.0.0.1:50051', picture] = process.argv.slice(2);
const client = new Client(target);
try {
  await tour();
} catch (error) {
  if (error.metadata === undefined) throw error; // not gRPC's
  console.error(`${target}: ${explain(error).join('; ')}`);
  process.exitCode = 1;
} finally {
  client.close();
}

async function tour() {
  const { answer: served } = await client.call('GetModel', {});
  const { card, serving } = served;
  console.log(`model ${card.name}/${card.version} of ${card.dataset.name}, on ${serving.provider}`);
  console.log(`  images [${card.image_shape}], latents [${card.latent_shape}]`);

  const { answer: fresh, trailers } = await client.call('Sample', {
    count: COUNT,
    seed: SEED,
    image_dtype: 'DATA_TYPE_UINT8',
  });
  console.log(`sample: [${fresh.images.shape}] ${fresh.images.dtype}, seed ${fresh.seed}`);
  const { 'vaeserve-call-id': id, 'vaeserve-queue-us': queue, 'vaeserve-compute-us': compute } = trailers;
  console.log(`  call ${id}: ${queue} us in the queue, ${compute} us in the graph`);
  const pixels = fromTensor(fresh.images);
  if (picture) savePicture(pixels, picture);

  const { answer: codes } = await client.call('Encode', { images: fresh.images });
  const [mean, stddev] = [codes.mean, codes.stddev].map((tensor) => fromTensor(tensor).array);
  console.log(`encode: mean [${codes.mean.shape}], first latent ${mean[0].toFixed(4)} +- ${stddev[0].toFixed(4)}`);

  // The answer's model, digest and all: the latents meet the decoder that they were made for, or an error.
  const { answer: copies } = await client.call('Decode', { model: codes.model, latents: codes.mean });
  const { array } = fromTensor(copies.images);
  const difference = array.reduce((sum, value, i) => sum + Math.abs(value - pixels.array[i] / 255), 0) / array.length;
  console.log(`decode: [${copies.images.shape}], ${difference.toFixed(4)} from the samples in the mean`);

  const wrong = toTensor(new Float32Array(2 * 3 * 5 * 7), [2, 3, 5, 7]);
  await fails('images of a wrong shape', 'Encode', { images: wrong });
  const other = { ...codes.model, digest: '0'.repeat(64) };
  await fails('latents of another model', 'Decode', { model: other, latents: codes.mean });
}

async function fails(what, rpc, request) {
  try {
    await client.call(rpc, request);
  } catch (error) {
    console.log(`${what}:`);
    for (const line of explain(error)) console.log(`  ${line}`);
    return;
  }
  throw new Error(`${what}: the server took them`);
}

/** Write images of 1 or 3 channels one below the other, as a portable grey map or pixel map. */
function savePicture({ array, shape }, path) {
  const [count, channels, height, width] = shape;
  const area = height * width;
  const rows = Buffer.alloc(array.length);
  for (let i = 0; i < array.length; i += 1) {
    const image = Math.floor(i / (channels * area));
    const channel = Math.floor(i / area) % channels;
    rows[(image * area + (i % area)) * channels + channel] = array[i];
  }
  const header = `${channels === 3 ? 'P6' : 'P5'} ${width} ${count * height} 255\n`;
  fs.writeFileSync(path, Buffer.concat([Buffer.from(header), rows]));
}
