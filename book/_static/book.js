// What scrolls sideways on a narrow screen can be reached and scrolled with the keyboard, too.
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  document.querySelectorAll('article :is(mjx-container[display="true"], .output, .map, .pst-scrollable-table-container)')
    .forEach(e => { if (e.scrollWidth > e.clientWidth) e.tabIndex = 0; });
});
