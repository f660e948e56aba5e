/* The API's page. Keys that are typed stay in this page; nothing is asked of other servers. */
"use strict";

SwaggerUIBundle({
  url: document.body.dataset.root + "openapi.json",
  dom_id: "#swagger",
  deepLinking: true,
  persistAuthorization: false,
  queryConfigEnabled: false,
  validatorUrl: null,
});
