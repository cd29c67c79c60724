// Image files as the server receives them: `{ id, src, name, width, height }` with a data URI in `src`.
import { newId } from "./tree.js";

const LONGEST = 2048; // pixels of the long side; the model's own images have 64 to 256
const MOST_BYTES = 4 << 20; // of a file; a conversation is sent whole with each question
const AS_IS = ["image/jpeg", "image/png", "image/webp"]; // what the server reads as the browser does

/** An image that the browser cannot read: `key` names the sentence that says so. */
export class Unreadable extends Error {
  constructor(key, name) {
    super(key);
    Object.assign(this, { key, name });
  }
}

/** Read a file. Its bytes stay as they are, except where they are too many, move, or are of a rare format. */
export async function readImage(file) {
  const name = file.name || "image";
  const head = new Uint8Array(await file.slice(0, 64).arrayBuffer());
  const type = typeOf(head);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // upright by its EXIF orientation, the first frame of several
  } catch {
    if (type === "image/heic") throw new Unreadable("heic", name);
    throw new Unreadable(type ? "tooLargeImage" : "notAnImage", name);
  }
  const { width, height } = bitmap;
  const isLarge = Math.max(width, height) > LONGEST;
  const asIs = AS_IS.includes(type) && file.size <= MOST_BYTES && !isLarge && !isAnimated(head);
  const src = asIs
    ? await dataUri(new Blob([file], { type }))
    : await redrawn(bitmap, type === "image/jpeg" || type === "image/heic");
  bitmap.close();
  const scale = isLarge ? LONGEST / Math.max(width, height) : 1;
  return { id: newId(), src, name, width: Math.round(width * scale), height: Math.round(height * scale) };
}

/** The pixels at no more than 2048 a side: a photo as JPEG, all else as PNG, unless that is large. */
async function redrawn(bitmap, isPhoto) {
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale)),
    height = Math.max(1, Math.round(bitmap.height * scale));
  const smaller = await createImageBitmap(bitmap, { resizeWidth: width, resizeHeight: height, resizeQuality: "high" });
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // behind what is transparent, as the page shows it
  context.fillRect(0, 0, width, height);
  context.drawImage(smaller, 0, 0);
  smaller.close();
  const lossless = isPhoto ? "" : canvas.toDataURL("image/png");
  return lossless && lossless.length < (MOST_BYTES * 4) / 3 ? lossless : canvas.toDataURL("image/jpeg", 0.95);
}

/** The type by the first bytes; names and what the system says are often wrong. */
function typeOf(head) {
  const text = String.fromCharCode(...head);
  if (text.startsWith("\xff\xd8\xff")) return "image/jpeg";
  if (text.startsWith("\x89PNG")) return "image/png";
  if (text.startsWith("GIF8")) return "image/gif";
  if (text.startsWith("RIFF") && text.slice(8, 12) === "WEBP") return "image/webp";
  if (text.startsWith("BM")) return "image/bmp";
  if (text.slice(4, 8) === "ftyp") return /hei|hev|mif1|msf1/.test(text.slice(8, 12)) ? "image/heic" : "image/avif";
  return "";
}

/** A WebP that moves says so in its first chunk, a PNG (mostly) right behind its header. */
function isAnimated(head) {
  const text = String.fromCharCode(...head);
  return text.includes("acTL") || (text.slice(12, 16) === "VP8X" && Boolean(head[20] & 2));
}

const dataUri = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
