// What the server asks of the what-if page. Texts are HTML made by tierwise, names in them escaped.
window.tierwise = {
  show(texts, drawn) {
    for (const [id, text] of Object.entries(texts)) getHtmlElement(id).innerHTML = text;
    for (const [id, options] of Object.entries(drawn)) getElement(+id).chart.setOption(options, true);
  },
  answered(count, address) {
    document.querySelector(".tw-count").textContent = count;
    history.replaceState(null, "", address);
  },
};
