/* What dnf does with a cache, done by librepo: load_cache CACHE URL SCRATCH TYPE...
 *
 * local:  the types of CACHE are found there, without the network.
 * repomd: URL's repomd.xml, and that alone, goes to SCRATCH (libdnf compares it with the cached).
 * remote: URL's files are wanted in CACHE; what lies there is checked by its chunks.
 *
 * Prints "step type path" lines; ends with 1 and one line on failure.
 */
#include <glib.h>
#include <librepo/librepo.h>
#include <stdio.h>

typedef struct {
    LrHandle *handle;
    GError *error;
    gboolean ok;
} Step;

static Step step(const char *url, char **types) {
    char *urls[] = {(char *)url, NULL};
    Step made = {lr_handle_init(), NULL, TRUE};
    made.ok = lr_handle_setopt(made.handle, &made.error, LRO_URLS, urls) &&
              lr_handle_setopt(made.handle, &made.error, LRO_REPOTYPE, (long)LR_YUMREPO) &&
              lr_handle_setopt(made.handle, &made.error, LRO_YUMDLIST, types) &&
              lr_handle_setopt(made.handle, &made.error, LRO_CHECKSUM, 1L);
    return made;
}

/* Without a cache folder librepo leaves zchunk alone. */
static void option(Step *made, LrHandleOption name, const char *value) {
    made->ok = made->ok && lr_handle_setopt(made->handle, &made->error, name, value);
}

static void flag(Step *made, LrHandleOption name) {
    made->ok = made->ok && lr_handle_setopt(made->handle, &made->error, name, 1L);
}

static int perform(Step made, LrResult *result, const char *name) {
    LrYumRepo *repo = NULL;
    int ok = made.ok && lr_handle_perform(made.handle, result, &made.error) &&
             lr_result_getinfo(result, &made.error, LRR_YUM_REPO, &repo);
    if (!ok)
        fprintf(stderr, "%s: %s\n", name, made.error ? made.error->message : "failed");
    else {
        printf("%s repomd %s\n", name, repo->repomd);
        for (GSList *item = repo->paths; item; item = item->next) {
            LrYumRepoPath *entry = item->data;
            printf("%s %s %s\n", name, entry->type, entry->path);
        }
    }
    lr_handle_free(made.handle);
    return ok;
}

int main(int count, char **words) {
    if (count < 5)
        return 2;
    const char *cache = words[1], *url = words[2], *scratch = words[3];
    char **types = words + 4;
    lr_global_init();

    LrResult *found = lr_result_init();
    Step local = step(cache, types);
    option(&local, LRO_CACHEDIR, cache);
    flag(&local, LRO_LOCAL);
    if (!perform(local, found, "local"))
        return 1;

    char *none[] = {NULL};
    LrResult *asked = lr_result_init();
    Step repomd = step(url, none);
    option(&repomd, LRO_DESTDIR, scratch);
    if (!perform(repomd, asked, "repomd"))
        return 1;

    Step remote = step(url, types);
    option(&remote, LRO_DESTDIR, cache);
    option(&remote, LRO_CACHEDIR, cache);
    flag(&remote, LRO_UPDATE);
    if (!perform(remote, found, "remote"))
        return 1;

    lr_result_free(found);
    lr_result_free(asked);
    return 0;
}
