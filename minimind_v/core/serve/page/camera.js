// A photo from the camera of a computer; a phone's own camera is opened by the file chooser.
import { fill, h } from "./dom.js";
import { t } from "./strings.js";

/** Show what the camera sees until a photo is taken; returns it as a File, or null. */
export function takePhoto() {
  const dialog = document.getElementById("camera");
  const video = h("video", { autoplay: true, muted: true, playsinline: true });
  const problem = h("p", { class: "problem", role: "alert" });
  const take = h("button", { type: "button", class: "primary", disabled: true }, t("takePhoto"));
  fill(dialog, t("camera"), video, problem, h("div", { class: "pair" }, take));
  dialog.showModal();
  let stream = null;
  navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1280 } } }).then(
    (opened) => {
      stream = opened;
      if (!dialog.open) return release();
      video.srcObject = stream;
      video.onloadeddata = () => {
        take.disabled = false;
        take.focus();
      };
    },
    (error) => {
      problem.textContent = t(error.name === "NotFoundError" ? "cameraMissing" : "cameraRefused");
    },
  );
  const release = () => stream?.getTracks().forEach((track) => track.stop());
  return new Promise((resolve) => {
    take.onclick = () => {
      const canvas = h("canvas", { width: video.videoWidth, height: video.videoHeight });
      canvas.getContext("2d").drawImage(video, 0, 0);
      canvas.toBlob(
        (blob) => {
          resolve(new File([blob], "camera.jpg", { type: "image/jpeg" }));
          dialog.close();
        },
        "image/jpeg",
        0.95,
      );
    };
    dialog.onclose = () => {
      release();
      dialog.replaceChildren();
      resolve(null);
    };
  });
}
