// What the server asks of the what-if page. Texts are HTML made by tierwise, names in them escaped.
window.tierwise = {
  // Write texts and draw charts, by number of element. Parts that need no layout of their own are kept.
  show(texts, drawn) {
    for (const [id, text] of Object.entries(texts)) getHtmlElement(id).innerHTML = text;
    for (const [id, options] of Object.entries(drawn)) tierwise.draw(id, options);
  },

  draw(id, options) {
    const chart = getElement(+id)?.chart;
    if (!chart) return setTimeout(() => tierwise.draw(id, options), 20);  // the page is still being built
    options.tooltip.formatter = tierwise.tip;
    chart.setOption(options, {replaceMerge: ["series", "xAxis", "yAxis", "grid", "legend"]});
  },

  // Note how many answers there were, and the address that leads back to this one.
  answered(count, address) {
    document.querySelector(".tw-count").textContent = count;
    history.replaceState(null, "", address);
  },

  // The box over a chart: of one point or bar, or of all lines at one x; units are the names of the dimensions.
  tip(at) {
    const number = (value, digits) => Math.abs(value) < 1e4 ? String(+value.toPrecision(digits)) : value.toFixed(0);
    const named = (value, unit, digits = 3) => `${number(value, digits)} ${unit === "-" ? "" : unit}`.trim();
    const plain = (text) => text.replace(/[&<>]/g, (sign) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"})[sign]);
    if (Array.isArray(at)) {
      const there = at.filter((p) => p.value?.length === 2);  // a line may go while it is pointed at
      if (!there.length) return "";
      const lines = there.map((p) => `${plain(p.seriesName)}: ${named(p.value[1], p.dimensionNames[1], 4)}`);
      return [named(there[0].value[0], there[0].dimensionNames[0]), ...lines].join("<br>");
    }
    if (at.value === undefined) return "";
    if (at.seriesType === "bar") return `${plain(at.name)}: ${plain(at.seriesName)} ${named(at.value, at.data.note)}`;
    const [x, y] = at.dimensionNames;
    const said = [plain(at.seriesName), named(at.value[0], x), named(at.value[1], y, 4)];
    return [...said, ...(at.data.note ? [plain(at.data.note)] : [])].join("<br>");
  },
};
