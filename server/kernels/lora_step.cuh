// Which token of a step uses which adapter, as LoraGpuStep writes it (lora_step.py).

constexpr int PAGE_ROWS = 8;

struct Step {
    const int* header;       // shrink items; tiles with an adapter, all tiles: small ones, then large ones; costs
    const int4* items;       // page, second page or -1; first position in token_order; tokens | page's place << 16
    const int* small_tiles;  // records, see lora_expand.cu: up to 4 tokens
    const int* large_tiles;  // up to 64 tokens
    const int* token_order;  // tokens by adapter, those without one last
    const int* page_table;   // [adapters, max_pages]
    int max_pages, num_tokens;
};
