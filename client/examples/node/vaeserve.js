// What another language needs of vaeserve, without a line of Python: the contract in vae.proto, tensors, errors.
//
// @grpc/proto-loader reads the contract itself, so there is no generated code to keep. Fields have the names that
// vae.proto gives them; 64-bit integers (seeds, shapes) are strings, since a JavaScript number holds only 53 bits.

import os from 'node:os';
import { fileURLToPath } from 'node:url';

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const CONTRACT = fileURLToPath(new URL('../../../protos/vaeserve/v1/vae.proto', import.meta.url));
const OPTIONS = { keepCase: true, longs: String, enums: String, defaults: true };
const { vaeserve } = grpc.loadPackageDefinition(protoLoader.loadSync(CONTRACT, OPTIONS));

const ARRAYS = { DATA_TYPE_FLOAT32: Float32Array, DATA_TYPE_UINT8: Uint8Array };

// The messages of google.rpc that say more than a status code: protos of their own, here in as much as is shown.
const DETAILS = protoLoader.fromJSON({
  nested: {
    Status: { fields: { details: { rule: 'repeated', type: 'Any', id: 3 } } },
    Any: { fields: { type_url: { type: 'string', id: 1 }, value: { type: 'bytes', id: 2 } } },
    ErrorInfo: { fields: { reason: { type: 'string', id: 1 } } },
    BadRequest: { fields: { field_violations: { rule: 'repeated', type: 'FieldViolation', id: 1 } } },
    FieldViolation: { fields: { field: { type: 'string', id: 1 }, description: { type: 'string', id: 2 } } },
  },
}, OPTIONS);

/** A client of the server at `target`, "host:port". For TLS give `grpc.credentials.createSsl(certificate)`. */
export class Client {
  constructor(target, { credentials = grpc.credentials.createInsecure(), timeoutMs = 10_000 } = {}) {
    this.stub = new vaeserve.v1.VaeService(target, credentials, { 'grpc.max_receive_message_length': -1 });
    this.timeoutMs = timeoutMs;
  }

  /** Call an RPC by its name. Gives its answer and the trailing metadata; throws gRPC's error, see `explain`. */
  call(rpc, request) {
    return new Promise((resolve, reject) => {
      let answer;
      const deadline = Date.now() + this.timeoutMs; // a call without one may wait for ever
      this.stub[rpc](request, { deadline }, (error, value) => {
        if (error) reject(error);
        answer = value;
      }).on('status', ({ metadata }) => resolve({ answer, trailers: metadata.getMap() }));
    });
  }

  close() {
    this.stub.close();
  }
}

/** The Tensor of a Float32Array or Uint8Array. */
export function toTensor(array, shape) {
  requireLittleEndian();
  const dtype = Object.keys(ARRAYS).find((name) => array instanceof ARRAYS[name]);
  return { dtype, shape, data: Buffer.from(array.buffer, array.byteOffset, array.byteLength) };
}

/** The array and the shape of a Tensor. */
export function fromTensor({ dtype, shape, data }) {
  requireLittleEndian();
  // Copied, because a Float32Array must begin at a multiple of 4 bytes, which a message's field need not.
  const bytes = data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength);
  return { array: new ARRAYS[dtype](bytes), shape: shape.map(Number) };
}

/** What went wrong with a call, in lines: status code and message, then the reason and the fields at fault. */
export function explain(error) {
  const lines = [`${grpc.status[error.code]}: ${error.details}`];
  for (const bytes of error.metadata.get('grpc-status-details-bin')) {
    for (const { type_url: url, value } of DETAILS.Status.deserialize(bytes).details) {
      const type = url.split('.').at(-1);
      if (type === 'ErrorInfo') lines.push(`reason: ${DETAILS.ErrorInfo.deserialize(value).reason}`);
      if (type === 'BadRequest') {
        const violations = DETAILS.BadRequest.deserialize(value).field_violations;
        lines.push(...violations.map(({ field, description }) => `field ${field}: ${description}`));
      }
    }
  }
  return lines;
}

function requireLittleEndian() {
  if (os.endianness() !== 'LE') throw new Error('tensors are little-endian and this machine is not: swap the bytes');
}
