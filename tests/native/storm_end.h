/* storm_end.h: the two ends of each link of a storm, shared by storm.c, which drives, and storm_end.c, which moves bytes. */
#ifndef STORM_END_H
#define STORM_END_H

#include "../../native/sim_events.h"
#include "storm.h"

/* The kinds of events, by names of the heap's own. */
enum { TAKE = EVENT_SWITCH, ARRIVE = EVENT_ARRIVE, RUN = EVENT_END, ROOM = EVENT_SENT, BREAK = EVENT_LOST, TICK = EVENT_DELIVER };
enum { PIECES_PER_FRAME = 6, LINE = 64 };

/* Payload that is not moved: the reader looks at it where it lies. */
typedef struct reference {
    struct reference *next;
    cl_frame frame;
    uint8_t *data;
    uint8_t *stage;          /* owned: `data` if it was copied there, and sent() was called at once */
    bool read, forgotten, kept;
} reference;

typedef struct packet {
    struct packet *next;
    double at_s;
    enum { PIECE, LENT, RECEIPT, HEARTBEAT, END } kind;
    bool begins;             /* the frame's header comes first */
    cl_frame frame;
    reference *reference;
    size_t offset, nbytes;
    uint8_t bytes[];
} packet;

typedef struct outgoing {
    struct outgoing *next;
    cl_frame frame;
    const uint8_t *payload;
    uint8_t *copy;           /* owned: of a payload that was forgotten */
    size_t taken;
    bool begun, forgotten;
} outgoing;

typedef struct end {
    cl_link base;
    storm *storm;
    struct end *remote;
    int32_t rank;
    bool shared, cut, over, closed, taking, refused, room;
    const char *broken;      /* to be told */
    outgoing *first, *last;
    size_t window_nbytes;    /* accepted here and not handed over there */
    double last_arrival_s;   /* of what was sent from here */
    reference *references;   /* of payloads sent from here */
    packet *in_first, *in_last;
    uint8_t *place;          /* where the frame now coming in lands */
    bool receiving;
    cl_frame in_frame;
    double heard_s;
} end;

struct storm {
    storm_weather weather;
    cl_settings settings;
    uint64_t random;
    double now_s, lively_s;  /* when something other than a heartbeat happened */
    cl_engine *engines[MAX_RANKS];
    end *ends[MAX_RANKS][MAX_RANKS];
    bool dead[MAX_RANKS], scheduled[MAX_RANKS];
    double paused_until_s[MAX_RANKS];
    cl_events events;
    storm_news *news;
    size_t nnews, first_news, capacity;
    const char *complaint;
};

uint64_t storm_pick(storm *s, uint64_t below);
double storm_pick_s(storm *s, double most_s);
void storm_add(storm *s, double at_s, int kind, int32_t rank, uint64_t token);
/* Something happens to this end after at most so long. */
void storm_later(end *e, double most_s, int kind);
/* An event of a link, as epoll would tell it. */
void storm_wake_for(end *e);

extern const cl_transport storm_transport;
void storm_take(end *e);
/* What was taken arrives, maybe half a frame; then the end. */
void storm_close_out(end *e);
void storm_drop_arriving(end *e);
void storm_take_heartbeats(end *e);
bool storm_has_come(const end *e);
void storm_free_end(end *e);

#endif
